# %% [markdown]
# # Quickstart
#
# Handwritten digits in batches of 449 images, a third of the training set, on a CPU in about a minute. This page is
# also [a notebook](quickstart.ipynb). It needs scikit-learn, and this project with TensorFlow or JAX: in a checkout,
# `pip install ".[tensorflow]"` or `pip install ".[jax]"`. With JAX, set the environment variable `KERAS_BACKEND=jax`
# before Keras is imported.

# %%
import keras
import numpy as np
from sklearn.datasets import load_digits

from lars_keras import LARS, schedules
from lars_keras.training import Trainer

keras.utils.set_random_seed(0)
digits = load_digits()
images, labels = np.float32(digits.images[..., None] / 16), digits.target
train, test = (images[:1347], labels[:1347]), (images[1347:], labels[1347:])

# %% [markdown]
# ## The optimizer in your own `compile`
#
# The learning rates of LARS are large, because each layer's step is multiplied by its trust ratio,
# `trust_coefficient * ||w|| / ||g||` with a coefficient of 1/1000. Biases are not adapted, and would take the whole
# rate. Where no batch normalization follows them, they need a factor of 0.05.


# %%
def small_network():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def lars(updates):
    rate = schedules.WarmupPolynomial(peak=10.0, warmup_updates=updates // 10, total_updates=updates)
    return LARS(rate, excluded_lr_scale=0.05)


loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model = small_network()
model.compile(lars(updates=3 * 60), loss, metrics=["accuracy"])
model.fit(*train, batch_size=449, epochs=60, verbose=0)
print("accuracy", model.evaluate(*test, verbose=0)[1])

# %% [markdown]
# ## Which variables are adapted

# %%
for row in model.optimizer.layer_plan():
    print(f"{row.path:30} adapted {row.adapt!s:6} decayed {row.decay!s:6} rate x {row.lr_scale:g}")

# %% [markdown]
# ## A batch that does not fit on the device
#
# `Trainer` takes the same update in micro-batches. Here an update is a batch of 1,280 images, taken as 10 micro-batches
# of 128.

# %%
model = small_network()
model.compile(lars(updates=120), loss, weighted_metrics=["accuracy"])
trainer = Trainer(model, batch_size=1280, microbatch_size=128)
trainer.fit(*train, epochs=120, verbose=0)
print(trainer.evaluate(*test))

# %% [markdown]
# ## Saved and loaded
#
# The optimizer comes back with its momentum, schedule and exclusions.

# %%
model.save("digits.keras")
again = keras.saving.load_model("digits.keras")
assert int(again.optimizer.iterations) == 120

# %% [markdown]
# ## Next
#
# - [Which optimizer, which batch size?](choosing.md)
# - [Optimizers](optimizers.md): rules, variants, exclusions, schedules
# - [Trainer](trainer.md), and [what keeps a long run alive](running.md)
