"""Tell the cost of a model's training step on a TPU slice, by the real TPU compiler, without a TPU.

```python
report = lars_keras.pod.check(make_model, ("uint8:224,224,3", "int32"), topology="v5e:8x8", batch_size=8192)
print(report)
```

`python -m lars_keras.pod` is the same check as a command. The compiler comes with the extra `pod`.
"""

from lars_keras.pod.driver import check
from lars_keras.pod.report import PodReport

__all__ = ["PodReport", "check"]
