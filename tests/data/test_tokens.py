"""Language models: losses, labels and scores against transformers' own."""

from __future__ import annotations

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    SoupWarning,
    UniformSoup,
)
from sksoup.data.tokens import check_labels
from sksoup.inspection import compare_soups, ingredient_importance, loss_barrier, paper_systems
from sksoup.recipes.validation import prepare_problem

from ..language import KINDS, VOCABULARY, build, checkpoints, reference, texts

TASK = "language-modeling"
every_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = [
    pytest.mark.filterwarnings("default:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::sksoup.SoupWarning"),  # weights are random
]


@every_kind
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [30, 7, None])
def test_loss_and_score_are_those_of_transformers(kind, side, batch_size):
    X, y = texts(kind, side=side)
    ckpts = checkpoints(kind, 2)
    soup = UniformSoup(task=TASK, batch_size=batch_size).fit(ckpts, X, y)
    expected = reference(soup.module_, X, y)
    assert soup.score(X, y) == pytest.approx(-expected, abs=1e-5)
    problem = prepare_problem(ckpts, X, y.numpy(), task=TASK, batch_size=batch_size)
    problem.module.load_state_dict(soup.module_.state_dict())
    assert problem.objective.mean_loss(problem.data, batch_size) == pytest.approx(
        expected, abs=1e-5
    )
    assert problem.evaluate().score == pytest.approx(-expected, abs=1e-5)


def test_padding_on_the_left_predicts_no_token():
    """The score is that of each text by itself, which transformers' loss of a batch is not."""
    X, _ = texts("llama", side="left")
    soup = UniformSoup(task=TASK).fit(checkpoints("llama", 2), X, None)
    losses, amounts = [], []
    for ids, mask in zip(X["input_ids"], X["attention_mask"], strict=True):
        alone = ids[mask.bool()][None]
        with torch.no_grad():
            losses.append(soup.module_(input_ids=alone, labels=alone).loss.item())
        amounts.append(alone.shape[1] - 1)
    assert len(set(amounts)) > 1
    assert soup.score(X) == pytest.approx(-np.average(losses, weights=amounts), abs=1e-5)


def test_a_label_after_padding_on_the_left_is_no_copy():
    """Only the first token of the text has been masked."""
    X = {"input_ids": np.array([[0, 7, 5, 6]]), "attention_mask": np.array([[0, 1, 1, 1]])}
    check_labels(np.array([[-100, 3, -100, -100]]), "masked", (4, 9), X)
    with pytest.raises(ValueError, match="y equals the inputs"):
        check_labels(np.array([[-100, 3, 5, -100]]), "masked", (4, 9), X)


@every_kind
def test_the_gradient_is_that_of_transformers_over_all_tokens(kind):
    X, y = texts(kind)
    ckpts = checkpoints(kind, 2)
    problem = prepare_problem(ckpts, X, y.numpy(), task=TASK, batch_size=7)
    problem.objective.loss_and_backward(tuple(problem.data.batches(7)))
    theirs = build(kind)
    theirs.load_state_dict(problem.module.state_dict())
    theirs.eval()(**X, labels=y).loss.backward()
    for ours, other in zip(problem.module.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_labels_of_a_causal_model_are_its_inputs_without_padding():
    X, y = texts("gpt2")
    ckpts = checkpoints("gpt2")
    given = UniformSoup(task=TASK).fit(ckpts, X, y)
    for kind in ({**X}, {**X, "labels": y}):
        assert UniformSoup(task=TASK).fit(ckpts, kind).score(kind) == given.score(X, y)
    ids = X["input_ids"]
    alone = UniformSoup(task=TASK).fit(ckpts, ids)
    loss = reference(given.module_, {"input_ids": ids}, ids)
    assert alone.score(ids) == pytest.approx(-loss, abs=1e-5)


def test_greedy_in_one_call_is_no_worse_than_the_best_checkpoint():
    ids = texts("gpt2", n=40)[0]["input_ids"]
    ckpts = checkpoints("gpt2", 6)
    soup = GreedySoup(task=TASK).fit(ckpts, ids)
    best = BestCheckpoint(task=TASK).fit(ckpts, ids)
    assert soup.score(ids) >= best.score(ids) - 1e-6
    assert soup.individual_scores_ == pytest.approx(best.individual_scores_)


def test_early_rejection_is_exact_and_spares_rows_of_hopeless_candidates():
    X, y = texts("gpt2", n=96)
    nets = [checkpoints("gpt2")[name] for name in checkpoints("gpt2")]
    bad = {n: w * 30 if w.is_floating_point() else w for n, w in nets[0].items()}
    ckpts = CheckpointCollection([*nets, bad], module=partial(build, "gpt2"))
    fast, slow = (
        GreedySoup(task=TASK, batch_size=16, early_rejection=rejects) for rejects in (True, False)
    )
    for soup in (fast, slow):
        with pytest.warns(SoupWarning):
            soup.fit(ckpts, X, y)
    assert fast.ingredients_ == slow.ingredients_
    assert fast.n_rows_evaluated_ < slow.n_rows_evaluated_
    for one, other in zip(fast.path_, slow.path_, strict=True):
        assert one["kept"] == other["kept"]
        assert one["score"] >= other["score"] - 1e-9  # a bound, or the score
    assert any(tried["is_bound"] for tried in fast.path_)


def test_prompts_that_are_left_out_and_weights_of_rows():
    X, y = texts("llama")
    y[:, :4] = -100  # a chat's prompt
    weight = np.random.default_rng(0).random(len(y))
    weight[::5] = 0
    ckpts = checkpoints("llama")
    soup = MEHLSoup(task=TASK, layerwise=True, batch_size=8, random_state=0)
    soup.fit(ckpts, X, y, sample_weight=weight)
    total = amount = 0.0
    for row, w in enumerate(weight):  # row by row, as slowly as it goes
        labels = y[row : row + 1]
        n = int((labels[:, 1:] != -100).sum())
        if n:
            part = {name: x[row : row + 1] for name, x in X.items()}
            total += w * n * reference(soup.module_, part, labels)
            amount += w * n
    assert soup.score(X, y, sample_weight=weight) == pytest.approx(-total / amount, abs=1e-5)
    assert soup.held_out_scores_["soup"] == pytest.approx(-total / amount, abs=1e-5)


@pytest.mark.parametrize(
    "soup",
    [
        MEHLSoup(layerwise=True, model_batch_size=2, random_state=0, batch_size=8),
        LearnedSoup(random_state=0, batch_size=8),
    ],
    ids=lambda soup: type(soup).__name__,
)
def test_learned_soups_lower_the_loss(soup):
    X, y = texts("gpt2", n=48)
    ckpts = checkpoints("gpt2", spread=0.3)
    soup.set_params(task=TASK).fit(ckpts, X, y)
    assert soup.score(X, y) >= BestCheckpoint(task=TASK).fit(ckpts, X, y).score(X, y) - 1e-6
    assert getattr(soup, "temperature_", 1.0) == 1.0
    assert "score" not in soup.history_[0]


def test_collated_batches_of_different_lengths_are_padded():
    ckpts = checkpoints("gpt2")
    rows = [torch.randint(5, VOCABULARY, (n,)) for n in (4, 9, 6, 7, 3, 8)]

    def collate(part):
        ids = nn.utils.rnn.pad_sequence(part, batch_first=True)
        lengths = torch.tensor([len(row) for row in part])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        labels = ids.masked_fill(~mask, -100)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    loader = DataLoader(rows, batch_size=2, collate_fn=collate)
    whole = collate(rows)
    one = UniformSoup(task=TASK, batch_size=4).fit(ckpts, loader)
    y = whole.pop("labels")
    assert one.score(loader) == pytest.approx(-reference(one.module_, whole, y), abs=1e-5)
    assert one.score(whole, y) == pytest.approx(one.score(loader), abs=1e-6)
    batches = one.predict(loader)
    direct = one.predict(whole)
    is_token = np.asarray(whole["attention_mask"]) == 1
    assert np.array_equal(batches[is_token], direct[is_token])


def test_collated_rows_without_a_mask_get_one():
    rows = [torch.randint(5, VOCABULARY, (n,)) for n in (4, 9, 6)]
    loader = [
        {"input_ids": row[None].where(torch.arange(len(row)) != 1, 4), "labels": row[None]}
        for row in rows
    ]
    soup = UniformSoup(task="masked-lm").fit(checkpoints("bert"), iter(loader))
    losses = [reference(soup.module_, {"input_ids": b["input_ids"]}, b["labels"]) for b in loader]
    mean = np.average(losses, weights=[len(row) for row in rows])
    assert soup.score(iter(loader)) == pytest.approx(-mean, abs=1e-5)


def test_a_decoder_gets_inputs_made_of_the_labels_or_those_that_are_given():
    X, y = texts("t5")
    ckpts = checkpoints("t5")
    soup = UniformSoup(task=TASK).fit(ckpts, X, y)
    decoder = build("t5").prepare_decoder_input_ids_from_labels(labels=y)
    given = UniformSoup(task=TASK).fit(ckpts, {**X, "decoder_input_ids": decoder}, y)
    assert given.score({**X, "decoder_input_ids": decoder}, y) == soup.score(X, y)
    assert given.predict({**X, "decoder_input_ids": decoder}).shape == y.shape
    with pytest.raises(ValueError, match=r"soup\.module_\.generate"):
        soup.predict(X)


def test_predictions_are_ids_and_probabilities_are_refused_with_the_reason():
    X, y = texts("gpt2")
    soup = UniformSoup(task=TASK, batch_size=4).fit(checkpoints("gpt2"), X, y)
    with torch.no_grad():
        expected = soup.module_(**X).logits.argmax(-1).numpy()
    assert np.array_equal(soup.predict(X), expected)
    assert not hasattr(soup, "predict_proba")
    with pytest.raises(AttributeError) as caught:
        soup.predict_proba(X)
    assert "rows x tokens x vocabulary" in str(caught.value.__cause__)


def test_an_ensemble_averages_the_logits_of_each_minibatch():
    X, y = texts("gpt2")
    ckpts = checkpoints("gpt2", 3)
    soup = CheckpointEnsemble(task=TASK, batch_size=4).fit(ckpts, X, y)
    with torch.no_grad():
        nets = [build("gpt2") for _ in ckpts]
        for net, name in zip(nets, ckpts, strict=True):
            net.load_state_dict(ckpts[name])
        logits = torch.stack([net.eval()(**X).logits for net in nets]).mean(dim=0)
    labels = y[:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    assert soup.score(X, y) == pytest.approx(-float(loss), abs=1e-5)
    loader = DataLoader([{n: x[k] for n, x in X.items()} for k in range(len(y))], batch_size=30)
    seen = []
    soup._module_outputs = lambda module, rows: (
        seen.append(len(rows["input_ids"])) or type(soup)._module_outputs(soup, module, rows)
    )
    assert soup.score(loader) == pytest.approx(-float(loss), abs=1e-5)
    assert max(seen) == 4  # also where a batch of the loader is larger


@pytest.mark.parametrize(
    ("kind", "task", "change", "said"),
    [
        ("bert", TASK, lambda X, y: (X, None), "y equals the inputs"),
        ("gpt2", TASK, lambda X, y: (X, y[:, 1:]), r"y has shape .*, 8\), but .* 9 tokens"),
        ("gpt2", TASK, lambda X, y: (X, y + VOCABULARY), r"expected token ids in \[0, 50\)"),
        ("gpt2", TASK, lambda X, y: (X, y * 0 - 100), "contains only -100"),
        (
            "gpt2",
            TASK,
            lambda X, y: (X, y.masked_fill(torch.arange(9) > 0, -100)),
            "no label to predict",
        ),
        ("gpt2", TASK, lambda X, y: (X, y.float()), "expected integers"),
        ("gpt2", TASK, lambda X, y: (X, y[:, 0]), "expected integers"),
    ],
)
def test_labels_that_can_not_be(kind, task, change, said):
    X, y = change(*texts(kind))
    with pytest.raises(ValueError, match=said):
        UniformSoup(task=task).fit(checkpoints(kind), X, y)


class Own(nn.Module):
    """A network of one's own, which does not say what it predicts."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

    def forward(self, ids):
        return self.out(self.embed(ids))


def test_a_module_of_ones_own_has_to_be_told():
    torch.manual_seed(0)
    ckpts = CheckpointCollection([Own() for _ in range(2)])
    ids = texts("gpt2")[0]["input_ids"]
    with pytest.raises(ValueError, match="task='causal-lm'"):
        UniformSoup(task=TASK).fit(ckpts, ids)
    soup = UniformSoup(task="causal-lm").fit(ckpts, ids)
    with torch.no_grad():
        logits = soup.module_(ids)[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert soup.score(ids) == pytest.approx(-float(expected), abs=1e-5)


def test_a_guess_is_warned_of():
    torch.manual_seed(0)
    X, y = texts("gpt2")
    nets = [{n: 40 * w for n, w in checkpoints("gpt2")[name].items()} for name in ("checkpoint0",)]
    ckpts = CheckpointCollection([*nets, *nets], module=partial(build, "gpt2"))
    with pytest.warns(SoupWarning, match=f"guessing among {VOCABULARY} tokens"):
        BestCheckpoint(task=TASK).fit(ckpts, X, y)


def test_a_run_whose_loss_is_not_finite_is_ranked_last():
    X, y = texts("gpt2")
    nets = [checkpoints("gpt2")[name] for name in checkpoints("gpt2")]
    nets[1] = {n: torch.full_like(w, 1e30) if "ln_f.weight" in n else w for n, w in nets[1].items()}
    ckpts = CheckpointCollection(nets, module=partial(build, "gpt2"))
    best = BestCheckpoint(task=TASK).fit(ckpts, X, y)
    assert min(best.individual_scores_, key=best.individual_scores_.get) == "checkpoint1"
    assert all(map(math.isfinite, best.individual_scores_.values()))
    best.recipe_.to_json()


def test_tables_and_cards_say_perplexity():
    X, y = texts("gpt2")
    ckpts = checkpoints("gpt2")
    systems = paper_systems(4, task=TASK)
    some = {name: systems[name] for name in ("Best checkpoint", "Greedy-Soup", "Ensemble")}
    found = compare_soups(ckpts, X, None, X, None, recipes=some)
    assert "validation perplexity" in str(found)
    best = found.results[0]
    assert found.cells()[0][1] == f"{math.exp(-best.held_out):.3f}"
    greedy = GreedySoup(task=TASK, min_improvement=-1.0).fit(ckpts, X, y)
    score, n = greedy.recipe_.held_out
    said = f"{score:.4f} (perplexity {math.exp(-score):.4g}) on {n} held-out rows"
    assert said in greedy.recipe_.to_card()


def test_importance_and_barriers():
    X, y = texts("gpt2")
    ckpts = checkpoints("gpt2", 3)
    soup = UniformSoup(task=TASK).fit(ckpts, X, y)
    importance = ingredient_importance(soup, X, y)
    assert importance.score == pytest.approx(soup.score(X, y))
    assert ingredient_importance(soup, X, y, scoring="neg_log_loss").scores == importance.scores
    barrier = loss_barrier(ckpts, X, y.numpy(), task=TASK)
    first = reference(UniformSoup(task=TASK).fit(ckpts.select(["checkpoint0"]), X, y).module_, X, y)
    assert barrier.losses[0, 0] == pytest.approx(first, abs=1e-5)


def test_a_scorer_that_generates_gets_tensors():
    X, y = texts("gpt2", side="left")
    X = {name: x[:, -4:] for name, x in X.items()}
    y = y[:, -4:]
    seen = []

    def exact_match(soup, X, y):
        written = soup.module_.generate(**X, max_new_tokens=2, do_sample=False, pad_token_id=0)
        seen.append(type(X["input_ids"]))
        return float((written[:, 4:] == torch.as_tensor(y)[:, 2:4]).all(dim=1).float().mean())

    soup = GreedySoup(task=TASK, scoring=exact_match).fit(checkpoints("gpt2"), X, y)
    assert set(seen) == {torch.Tensor}
    right = 30 * np.array([*soup.individual_scores_.values()])
    assert right == pytest.approx(right.round())


def test_neg_log_loss_is_the_score():
    X, y = texts("gpt2")
    ckpts = checkpoints("gpt2")
    named = GreedySoup(task=TASK, scoring="neg_log_loss").fit(ckpts, X, y)
    assert named.path_ == GreedySoup(task=TASK).fit(ckpts, X, y).path_
    with pytest.raises(ValueError, match=re.escape("'accuracyy'")):
        GreedySoup(task=TASK, scoring="accuracyy").fit(ckpts, X, y)


def test_logits_of_all_rows_are_never_held():
    """Counted: a few arrays of a minibatch's logits are alive, with a vocabulary of 50,000."""
    from sksoup.runtime.live_tensors import LiveTensors

    vocabulary, n = 50_000, 24
    ckpts = CheckpointCollection([build("gpt2", vocabulary) for _ in range(2)])
    ids = torch.randint(0, vocabulary, (n, 8))
    minibatch = 2 * 8 * vocabulary * 4
    soup = GreedySoup(task=TASK, batch_size=2)
    held = [*ckpts.held_tensors()]
    with LiveTensors(ignored=held) as live:
        soup.fit(ckpts, ids)
    models = 5 * ckpts.nbytes  # the module, the running sum in float64, the mean, and the mix
    assert live.peak < models + 4 * minibatch
    with LiveTensors(ignored=[*held, *soup.module_.state_dict().values()]) as live:
        soup.score(ids)
        soup.predict(ids)
    assert live.peak < 4 * minibatch < n * 8 * vocabulary * 4


class Ids(nn.Module):
    """A causal model of ids without a name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("batch_size", [1, 3, 128, None])
def test_ids_without_a_name_are_labels_before_they_are_padded(batch_size):
    torch.manual_seed(0)
    batches = [torch.randint(1, VOCABULARY, (2, n)) for n in (4, 4, 12, 6, 12)]
    soup = UniformSoup(task="causal-lm", batch_size=batch_size)
    soup.fit(CheckpointCollection([Ids(), Ids()]), iter(batches))
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(
                soup.module_(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            for ids in batches
        ]
    expected = -float(torch.cat(losses).mean())
    assert soup.score(iter(batches)) == pytest.approx(expected, abs=1e-5)
    assert soup.mean_log_likelihood(iter(batches)) == pytest.approx(expected, abs=1e-5)
    best = BestCheckpoint(task="causal-lm").fit(CheckpointCollection([soup.module_]), iter(batches))
    assert best.individual_scores_["checkpoint0"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("task", ["masked-lm", "language-modeling"])
def test_padding_that_a_model_would_read_is_refused(task):
    ids = [torch.randint(1, VOCABULARY, (2, n)) for n in (4, 12)]
    with pytest.raises(ValueError, match=r"texts of 4 to 12 tokens without an attention mask"):
        UniformSoup(task=task).fit(checkpoints("bert"), iter([(x, x) for x in ids]))
    labels = [torch.where(torch.arange(x.shape[1]) == 1, x, -100) for x in ids]
    masked = ids[0].masked_fill(labels[0] != -100, 4)
    soup = UniformSoup(task="masked-lm").fit(checkpoints("bert"), masked, labels[0])
    with pytest.raises(ValueError, match=r"texts of 4 to 12 tokens without an attention mask"):
        soup.score(iter(zip(ids, labels, strict=True)))
