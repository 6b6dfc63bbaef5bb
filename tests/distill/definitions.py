"""Divergences as their papers write them, over whole distributions, for autograd in float64: the tests' reference."""

import torch


def by_definition(name, parameter, z, t):
    """Written from the papers, sums over all classes, for autograd."""
    p, q = torch.softmax(t, 1), torch.softmax(z, 1)
    kl = lambda a, b: (a * (a.log() - b.log())).sum(1)  # noqa: E731
    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            m = parameter * p + (1 - parameter) * q
            return (parameter * kl(p, m) + (1 - parameter) * kl(q, m)) / (parameter * (1 - parameter))
        case "skew_kl":
            return kl(p, parameter * p + (1 - parameter) * q)
        case "skew_reverse_kl":
            return kl(q, parameter * q + (1 - parameter) * p)
        case "tvd":
            return (p - q).abs().sum(1) / 2
        case "adaptive_kl":
            values, order = p.sort(dim=1, descending=True)
            head = values.cumsum(1) <= parameter
            head[:, 0] = True
            apart = (p - q).abs().detach().gather(1, order)
            share = (apart * head).sum(1) / apart.sum(1)
            return share * kl(p, q) + (1 - share) * kl(q, p)
    raise AssertionError(name)
