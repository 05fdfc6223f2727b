"""Settings, a gate and readers that tests of synthetic sets share."""

import json

from diffusers_dino.synthesis import SynthesisSettings

LABELS = [{"effusion"}, {"effusion", "mass"}, {"mass"}, {"nodule"}, {"mass"}, {"nodule"}, set()]
SETTINGS = SynthesisSettings(num_inference_steps=2, batch_size=4, shard_size=8, threads=1)


class BrightnessGate:
    """Refuses dark images; may be interrupted at a call, as a user does with Ctrl-C."""

    def __init__(self, least=0.0, interrupt_at=None):
        self.least, self.interrupt_at, self.seen = least, interrupt_at, []

    def __call__(self, images):
        if len(self.seen) == self.interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(images)
        return images.mean((1, 2, 3)) >= self.least

    def fingerprint(self):
        return f"brightness {self.least}"


def facts_of(made):
    images = made.images()
    return [json.loads(images.companion(place, "json")) for place in range(len(images))]
