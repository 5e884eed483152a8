# SPDX-License-Identifier: Apache-2.0
"""The oracle: each op once more, slow and obvious, straight from its paper. Imports nothing of ours."""
