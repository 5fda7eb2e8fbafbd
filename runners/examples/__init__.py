"""Examples to copy from; nothing imports them."""
