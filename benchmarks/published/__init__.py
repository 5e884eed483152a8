# SPDX-License-Identifier: Apache-2.0
"""One epoch of Cluster Contrast as its published training scripts do it, restated in plain PyTorch, NumPy and
scikit-learn: what ``bench_epoch.py`` holds ours against. A phase a file, in the order of an epoch.

``images`` (transforms on one PIL image at a time, a DataLoader), ``extract`` (eval mode, features kept by path),
``search`` (flat faiss), ``jaccard`` (a loop over rows, dense N x N), ``label`` (these two, then scikit-learn's DBSCAN),
``memory`` (updated sample after sample inside the backward pass), ``fit``, ``evaluate`` (dense distances, argsort).
Nothing here imports fastreid_u.
"""
