"""Products with weights that are stored in fewer bits than they are multiplied with."""
