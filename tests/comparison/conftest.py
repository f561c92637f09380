"""The folders below import `compare_cases` from here."""
