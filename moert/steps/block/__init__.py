"""What a whole block does before its experts: router logits, and ids and weights of all K + n slots."""
