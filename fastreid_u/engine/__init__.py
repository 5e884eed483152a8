# SPDX-License-Identifier: Apache-2.0
"""The epoch: extract features, label them, fit the network to the labels, evaluate; and what a person sees of it."""
