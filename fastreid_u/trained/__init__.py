# SPDX-License-Identifier: Apache-2.0
"""What a trained network is used for, a file each."""
