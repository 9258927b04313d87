# An embedding of your own, packed as docs/guide.md says: the values of `python -m bench.public`.
#
#     python train.py config/embedding.py --data=data/mine --out_dir=out/mine
data = "data/mine"
out_dir = "out/mine"
n_annotated = 1000  # all that have captions
T = 32  # half of it, 16 steps, must hold what a caption depends on
predict_weight = 0.0
