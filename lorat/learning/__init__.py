"""How the network learns: losses, optimiser, augmentation on the device, and the loop.

None of it needs Ray.  A training on shards of frames, with a DataLoader of torch whose processes
decode, is this::

    import numpy as np
    from torch.utils.data import DataLoader, Dataset

    from lorat.checkpoint import save
    from lorat.config.training import TrainConfig, resolve
    from lorat.data import synthetic
    from lorat.data.pairs.batches import Decoder
    from lorat.data.pairs.sampler import PairSampler
    from lorat.data.shards.frame_index import FrameIndex
    from lorat.data.shards.images import ImageReader
    from lorat.learning.loop import Hooks, run

    SHARDS = synthetic.ensure(None, "train")  # or what jobs/ingest.py has written
    CONFIG = resolve(TrainConfig(variant="T-112", epochs=1, pairs_per_epoch=64, batch_size=16))


    class Steps(Dataset):
        \"""Item k is the batch of step k: pair i is always the same, whoever decodes it.\"""

        def __init__(self) -> None:
            self.decoder = None  # each process opens the shards for itself

        def __len__(self) -> int:
            return CONFIG.total_steps

        def __getitem__(self, step: int) -> dict[str, np.ndarray]:
            if self.decoder is None:
                index = FrameIndex.open(SHARDS)
                how = (CONFIG.model_variant, CONFIG.sampling, CONFIG.augment, CONFIG.seed)
                sampler = PairSampler([index], [1.0], *how)
                self.decoder = Decoder(sampler, [ImageReader(index)])
            first = step * CONFIG.batch_size
            return self.decoder.load(np.arange(first, first + CONFIG.batch_size))


    class Source:
        \"""What the loop asks for batches.\"""

        def batches(self, start_step: int):
            loader = DataLoader(
                Steps(),
                batch_size=None,  # an item is a batch already
                sampler=range(start_step, CONFIG.total_steps),
                num_workers=2,
                collate_fn=lambda batch: batch,
                multiprocessing_context="fork",
            )
            yield from loader


    def show(step: int, metrics: dict[str, float]) -> None:
        print(f"step {step}: loss {metrics['train/loss']:.3f}")


    learner = run(CONFIG, Source(), hooks=Hooks(log_every=1, on_interval=show))
    save(learner.model, CONFIG, "tracker")  # a folder that jobs/track.py --model takes

"""
