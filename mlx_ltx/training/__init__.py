"""Training: the transformer by flow matching, whole or as a LoRA.

From a config to a finished LoRA, event by event (``python -m mlx_ltx.train`` shows the same events):

    from mlx_ltx.training.config import read_config
    from mlx_ltx.training.trainer import train
    for event in train(read_config("my-lora.yaml")): ...

The parts, for a script that has its own data and model (any ``nn.Module`` and any loss):

    model.unfreeze()
    loss = FlowLoss(NoiseLevels(), first_frame_probability=0.1)       # training.flow
    training = Training(model, Optimization(learning_rate=1e-3, steps=5000))   # training.loop
    for step in training.run(loss, batches):                          # ``batches(number)`` gives the number-th batch
        ...                                                           # a TrainingStep event with losses and speed
        training.save("state.safetensors"), training.restore("state.safetensors")   # exact resuming

Everything random in a step follows from the seed and the step's number, so a resumed run is the same run.
"""
