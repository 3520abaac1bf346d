"""The `finetune` command: validate, crd, init and run, for people on a terminal and for programs in pipes."""
