"""How the demo checkpoint `zoo-demo` was made: corpus, tokenizer, training, evaluation.

`checkpoints/zoo-demo/README.md` is the model card and lists the commands in order.
"""
