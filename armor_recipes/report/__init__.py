"""What is written beside the weights: the manifest (a function of the inputs), the report (times, memory), the model card."""
