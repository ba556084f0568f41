"""What a command will do and need, said before it starts; nothing that training itself needs."""
