"""einsum, tensordot, bilinear and others, of the products that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lnpu_torch.nn.attention import Products, is_weight


def einsum(products: Products, equation: Any, *operands: Any) -> Any:
    """`torch.einsum` of two operands or more, from left to right; NotImplemented for what multiplies nothing.

    An operand with a subscript that occurs twice is not taken.
    """
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or not len(operands) == equation.count(",") + 1 > 1:
        return NotImplemented
    terms, result = _subscripts(equation.replace(" ", ""), operands)
    if any(len(set(term)) != len(term) for term in terms) or not set(result) <= set().union(*terms):
        return NotImplemented
    whole, letters = operands[0], terms[0]
    for index, (other, term) in enumerate(zip(operands[1:], terms[1:], strict=True), start=1):
        later = "".join([result, *terms[index + 1 :]])
        whole, letters = _contract(products, whole, letters, other, term, later, f"{index}" if index > 1 else "")
    return whole.permute([letters.index(letter) for letter in result]).contiguous()  # as torch's often is


def _subscripts(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str]:
    """Each operand's letters, and the result's; an ellipsis becomes letters of its own."""
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    free = [chr(code) for code in range(0x100, 0x180)]
    longest = 0
    for place, (term, operand) in enumerate(zip(terms, operands, strict=True)):
        if "..." in term:
            count = operand.dim() - (len(term) - 3)
            longest = max(longest, count)
            terms[place] = term.replace("...", "".join(free[len(free) - count :]))
    batch = "".join(free[len(free) - longest :]) if longest else ""
    if not arrow:
        together = "".join(terms)
        result = batch + "".join(sorted(c for c in set(together) - set(batch) if together.count(c) == 1))
    return terms, result.replace("...", batch)


def _contract(
    products: Products, a: Tensor, left: str, b: Tensor, right: str, later: str, part: str
) -> tuple[Tensor, str]:
    """The product of two operands with letters; letters that nothing needs later are summed over.

    The result's letters are in the order of `later`, as far as they can be, so that it often need not be moved.
    """
    for letter in set(left) - set(right) - set(later):
        a, left = a.sum(left.index(letter)), left.replace(letter, "")
    for letter in set(right) - set(left) - set(later):
        b, right = b.sum(right.index(letter)), right.replace(letter, "")
    batch, summed = [c for c in left if c in right and c in later], [c for c in left if c in right and c not in later]
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]
    batch, rows, columns = (sorted(some, key=later.index) for some in (batch, rows, columns))
    entries = [batch] if batch else []
    sizes = dict(zip(left, a.shape, strict=True))
    sizes |= {c: max(size, sizes.get(c, 1)) for c, size in zip(right, b.shape, strict=True)}  # a size of 1 is spread
    a = _arranged(a, left, [*entries, rows, summed], sizes)
    b = _arranged(b, right, [*entries, columns, summed], sizes).mT
    out = products.matmul(a, b, part)
    letters = batch + rows + columns
    return out.reshape([sizes[c] for c in letters]), "".join(letters)


def _arranged(x: Tensor, letters: str, groups: list[list[str]], sizes: dict[str, int]) -> Tensor:
    """An operand with one dimension for each group of letters."""
    order = [c for group in groups for c in group]
    x = x.permute([letters.index(c) for c in order]).expand([sizes[c] for c in order])
    return x.reshape([prod(sizes[c] for c in group) for group in groups])


def tensordot(products: Products, a: Tensor, b: Tensor, dims: Any = 2) -> Any:
    """`torch.tensordot`; NotImplemented for sizes of 1 that are spread."""
    if isinstance(dims, Tensor):
        return NotImplemented
    if isinstance(dims, int):
        ours, theirs = list(range(a.dim() - dims, a.dim())), list(range(dims))
    else:
        ours, theirs = ([each] if isinstance(each, int) else list(each) for each in dims)
    ours, theirs = [d % a.dim() for d in ours], [d % b.dim() for d in theirs]
    if [a.shape[d] for d in ours] != [b.shape[d] for d in theirs]:
        return NotImplemented
    kept, others = ([d for d in range(x.dim()) if d not in used] for x, used in ((a, ours), (b, theirs)))
    shape = [a.shape[d] for d in kept] + [b.shape[d] for d in others]
    length = prod(a.shape[d] for d in ours)
    left = a.permute(kept + ours).reshape(-1, length)
    right = b.permute(theirs + others).reshape(length, -1)
    return products.matmul(left, right).reshape(shape)


def bilinear(products: Products, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.bilinear`: input1 [*, I], input2 [*, J], weight [O, I, J] -> [*, O].

    First input1 is multiplied by the weight, as in a linear layer, then the result by input2.
    """
    outputs, _, width = weight.shape
    rows = weight.mT.reshape(outputs * width, -1)
    first = products.linear(input1, rows, None, "weight").reshape(*input1.shape[:-1], outputs, width)
    out = products.matmul(first, input2.unsqueeze(-1), "inputs").squeeze(-1)
    return out if bias is None else out + bias


def inner(products: Products, input: Tensor, other: Tensor) -> Any:
    """`torch.inner`; NotImplemented for a scalar, which multiplies elements."""
    return tensordot(products, input, other, ([-1], [-1])) if input.dim() and other.dim() else NotImplemented


def addmm(products: Products, input: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """`torch.addmm`, and `baddbmm`, `addmv`: beta input + alpha a b."""
    plain = (beta, alpha) == (1, 1) and input.dim() == 1 and is_weight(b) and b.dim() == 2
    if plain:
        return products.linear(a, b.mT, input)
    out = products.matmul(a, b)
    out = out if alpha == 1 else out * alpha
    if beta == 0:  # NaN is not passed on, and a gradient of zeros is
        return out + input.masked_fill(torch.ones_like(input, dtype=torch.bool), 0) if input.requires_grad else out
    return out + (input if beta == 1 else input * beta)


def addbmm(products: Products, input: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """`torch.addbmm`: beta input + alpha times the sum of a b over the batch, which is one product of longer rows."""
    return addmm(products, input, a.transpose(0, 1).flatten(1), b.flatten(0, 1), beta=beta, alpha=alpha)


def in_place(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`addmm_` and others: what `run` returns, in the place of `input`."""

    def wrapped(products: Products, input: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        return input.copy_(run(products, input, a, b, beta=beta, alpha=alpha))

    return wrapped


def grouped_mm(
    products: Products,
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """`torch.nn.functional.grouped_mm`: each group's product alone, as experts of a mixture make them.

    mat_a is [G, M, K] or [M, K], mat_b [G, K, N] or [K, N]. `offs` [G], read on the host, are the groups' ends: in M or
    N of the one that is a matrix, in K if both are. NotImplemented with a bias.
    """
    if bias is not None:
        return NotImplemented
    if offs is None:
        out = products.matmul(mat_a, mat_b)
    else:
        spans = [slice(*span) for span in pairwise([0, *offs.tolist()])]
        rows, columns = mat_a.dim() == 2, mat_b.dim() == 2
        if rows and columns:
            out = torch.stack([products.matmul(mat_a[:, span], mat_b[span]) for span in spans])
        elif rows:
            out = torch.cat([products.matmul(mat_a[span], each) for span, each in zip(spans, mat_b, strict=True)])
            out = F.pad(out, (0, 0, 0, len(mat_a) - len(out)))
        else:
            out = torch.cat([products.matmul(each, mat_b[:, span]) for each, span in zip(mat_a, spans, strict=True)], 1)
            out = F.pad(out, (0, mat_b.shape[1] - out.shape[1]))
    return out if out_dtype is None else out.to(out_dtype)
