# SPDX-License-Identifier: Apache-2.0
"""Label generators, one file each: from an epoch's features to its pseudo-labels.

A recipe names one, ``self.labels = InfomapLabels(config, images)``, and the engine calls it once an epoch. To add one,
write one file with a subclass of ``generator.LabelGenerator``; no other file has to know of it.
"""
