# SPDX-License-Identifier: Apache-2.0
"""One file per op: check, choose a backend, call.

Empty on purpose: ``fastreid_u.ops.knn`` is always the module, ``fastreid_u.knn`` always the function.
"""
