"""Command lines that the help and the documentation show; the tests run each of them."""

from __future__ import annotations

EXAMPLES = {
    "inspect": (
        "sksoup inspect runs",
        "sksoup inspect 'runs/ft*' --json",
    ),
    "average": (
        "sksoup average runs -o mean",
        "sksoup average runs --weights 0.5 0.3 0.2 -o weighted --dtype bfloat16",
        "sksoup average nets -o mean.safetensors",
        "sksoup average runs -o sharded --shard-size 500MB",
    ),
    "stock": (
        "sksoup stock runs --start base -o stock",
        "sksoup stock nets --start start.safetensors -o stock.safetensors",
    ),
    "greedy": (
        "sksoup greedy runs --data val.csv --text text --label label -o soup",
        "sksoup greedy nets --module model:build --data val.npz -o greedy.safetensors",
        "sksoup greedy nets --module model:build --data table.csv --label species \\\n"
        "      --scoring f1_macro -o f1.safetensors",
    ),
    "learned": (
        "sksoup learned runs --data val.csv --text text --label label -o learned",
        "sksoup learned nets --module model:build --data val.npz --layerwise --epochs 10 \\\n"
        "      -o learned.safetensors",
    ),
    "mehl": (
        "sksoup mehl runs --data val.csv --text text --label label --layerwise -o mehl",
        "sksoup mehl nets --module model:build --data val.npz --test test.npz --seed 0 \\\n"
        "      --model-batch-size 2 --memory cache -o mehl.safetensors",
    ),
    "compare": (
        "sksoup compare nets --module model:build --data val.npz --test test.npz",
        "sksoup compare runs --data val.csv --test test.csv --text text --label label \\\n"
        "      --system Greedy-Soup --system MEHL-Soup",
    ),
    "cook": (
        "sksoup cook mean.safetensors nets -o again.safetensors",
        "sksoup cook mean runs -o again",
    ),
    "verify": (
        "sksoup verify mean.safetensors nets",
        "sksoup verify soup runs --json",
    ),
}
