"""Drawn convolutional networks of two hidden layers: what the last hidden layer makes of the vertices of the outputs.

Given the last hidden layer, outputs are Gaussian with the covariance G, and their NTK has the mean h over the read-out
and the parts between outputs that B and F are made of. All are averaged over networks; layers are written out with the
matrices P^d of the convolutions, apart from the package's averages over patches.
"""

import torch

from tests.oracles.drawn_networks import drawn


def shifts(size, kernel, stride=1, padding=0, circular=False):
    """P^d of a convolution along one axis, (k, P', P)."""
    out = (size + 2 * padding - kernel) // stride + 1
    maps = torch.zeros(kernel, out, size, dtype=torch.float64)
    for d in range(kernel):
        for o in range(out):
            at = o * stride + d - padding
            if circular:
                at %= size
            if 0 <= at < size:
                maps[d, o, at] = 1
    return maps


def plane(first, second):
    """P^d of a two-dimensional convolution."""
    both = torch.einsum("dab,ecf->deacbf", first, second)
    return both.flatten(0, 1).flatten(1, 2).flatten(2, 3)


class Drawn:
    """Networks x -> conv -> conv -> read-out, (S, ..) at once.

    Args:
        maps: P^d of the three layers, (k, P', P) each.
        channels: n_0, n_1, n_2.
        options: C_b, C_W, lambda_b, lambda_W of every layer.
        activation: sigma.
        x: (N, n_0, P).
        count: S.
        generator: Of the weights.
        laws: Of weights and biases.
    """

    def __init__(self, maps, channels, options, activation, x, count, generator, laws=("gaussian", "gaussian")):
        self.maps, self.n, self.sigma = maps, channels, activation
        C_b, C_W, lambda_b, lambda_W = options
        N = len(x)
        patches = torch.einsum("dop,ncp->nocd", maps[0], x).flatten(2).flatten(0, 1)  # (N P, n_0 k)
        n_1, n_2 = channels[1:]
        W = drawn(laws[0], C_W / patches.shape[1], (count, n_1, patches.shape[1]), generator)
        z = W @ patches.T + drawn(laws[1], C_b, (count, n_1, 1), generator)
        Theta = lambda_b + lambda_W * patches @ patches.T / patches.shape[1]
        s, d = activation(z), activation(z, 1)
        k = len(maps[1])
        big = torch.stack([torch.block_diag(*[one] * N) for one in maps[1]])  # (k, N P', N P)
        moved = torch.einsum("koy,sjy->sjko", big, s)
        fan = n_1 * k
        W = drawn(laws[0], C_W / fan, (count, n_2, n_1, k), generator)
        z = torch.einsum("sijk,sjko->sio", W, moved) + drawn(laws[1], C_b, (count, n_2, 1), generator)
        own = lambda_b + lambda_W / fan * torch.einsum("sjko,sjkp->sop", moved, moved)
        B = torch.einsum("sijk,koy,sjy->sijoy", W, big, d)
        H = torch.einsum("sijoy,yv,sljpv->silop", B, Theta, B)
        H = H + torch.eye(n_2, dtype=H.dtype)[:, :, None, None] * own[:, None, None]
        self.s, self.d, self.H = activation(z), activation(z, 1), H
        self.last = torch.stack([torch.block_diag(*[one] * N) for one in maps[2]])  # (k, N, N P)
        self.options = options

    def parts(self):
        """G and h, (S, N, N); n B_1324 and n F_1324, (S, N, N, N, N)."""
        C_b, C_W, lambda_b, lambda_W = self.options
        fan = self.n[2] * len(self.last)
        s = torch.einsum("kay,siy->sika", self.last, self.s)
        square = torch.einsum("sika,sikb->sab", s, s) / fan
        G = C_b + C_W * square
        own = self.H.diagonal(dim1=1, dim2=2).movedim(-1, 1)  # (S, n, L, L)
        slope = torch.einsum("kay,siy->sikay", self.last, self.d)
        h = lambda_b + lambda_W * square + C_W / fan * torch.einsum("sikay,siyv,sikbv->sab", slope, own, slope)
        # Of two labels that share a read-out weight, neuron and offset are the same: i with k, j with l.
        per = torch.einsum("sikay,sijyv,sjlbv->sijklab", slope, self.H, slope)
        B = self.n[2] * (C_W / fan) ** 2 * torch.einsum("sijklac,sijklbd->sabcd", per, per)
        F = self.n[2] * (C_W / fan) ** 2 * torch.einsum("sika,sjlc,sijklbd->sabcd", s, s, per)
        return G, h, B, F
