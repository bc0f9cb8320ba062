"""From logits to one token for each row, on the device."""
