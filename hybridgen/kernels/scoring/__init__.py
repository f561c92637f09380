"""How likely given tokens are."""
