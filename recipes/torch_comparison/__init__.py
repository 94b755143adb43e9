"""The parts of `recipes.compare_torch`: one question about the two frameworks each."""
