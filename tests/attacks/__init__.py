"""What a hostile file or folder can do: nothing but be refused, soon and in little memory."""
