"""What a training step costs on a TPU pod, by compiling it with the real TPU compiler, without a TPU.

    python -m lars_keras.pod --flagfile=flags/recipes/alexnet_bn_32k.flags --topology=v5e:16x16

`chips` has the public figures, `programs` lowers and compiles the step of either engine (each in a process of its own),
`measure` reads the compiled program, `roofline` makes a verdict of it, `__main__` is the command.
"""
