"""What the compiler is held against: rendered clips, recipes for the weights, and the measures of drift."""
