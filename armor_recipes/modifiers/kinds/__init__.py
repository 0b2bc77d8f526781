"""The kinds of modifiers, a file each: what its methods define, the rows of its plan, and the steps that carry them out."""
