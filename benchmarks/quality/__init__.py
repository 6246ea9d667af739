"""Learning quality: side networks against QLoRA at equal compute and equal memory, on backbones made here."""
