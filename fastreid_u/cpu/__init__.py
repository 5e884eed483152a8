# SPDX-License-Identifier: Apache-2.0
"""The label ops on a CPU, compiled by numba. Exact, O(N k) in memory, the same result on any number of threads.

Each file has the op's name and its function the op's signature. They import nothing of ours but each other.
"""
