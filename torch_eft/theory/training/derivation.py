"""Training at order 1/n on one page: the vertices that contribute to each observable, and the reasons.

**What is averaged.** One network's training is a function F of its tensors at the start, z, H, dH, ddI, ddII
(``hierarchy``: order 1 of NTK, dNTK and ddNTK; PDLT 11 and chapter infinity; the hierarchy of equations of Huang & Yau
2020; the powers of 1/n of Dyer & Gur-Ari 2019). Over initializations these tensors are nearly Gaussian or constant:
z ~ N(0, K), H = Theta, the others 0, and what is connected beyond that is of order 1/n or smaller. To that order
(derived here),

    E O = < [1 + G1/2 d_z d_z + Theta1 d_H + cov(H, H)/2 d_H d_H + cum(z, z, H)/2 d_z d_z d_H + cov(z, dH) d_z d_dH
             + <ddI> d_ddI + <ddII> d_ddII + cum(z, z, z, z)/24 d_z d_z d_z d_z] O(F) >    over z ~ N(0, K),

at (z, Theta, 0, 0, 0). G1 and Theta1 are the corrections of K and Theta; the others are vertices (PDLT 4, 8, 11 and
infinity): cov(H, H) is A and B, cum(z, z, H) is D and F, cov(z, dH) is P and Q, <ddI> is R, <ddII> is S, T and U, and
cum(z, z, z, z) is V, each a tensor over inputs times Kronecker deltas of the outputs.

**Parity.** Changing the sign of the last layer's parameters leaves their distribution as it is. It changes the sign of

    odd:   z, dH                    even:  H, ddI, ddII

so that <dH>, cov(z, H), cov(H, dH), and cum(z, z, z) vanish, and nothing else enters at this order.

**Degree.** For squared error F is a polynomial in z: the frozen path is linear in it, every dH brings one more factor
e = z - y, and every ddI or ddII two. Order by order, the degree in z(0) of

                        F       dF/dH   dF/d(dH)   dF/d(ddI), dF/d(ddII)
    z(t)                1       1       2          3
    z(t) z(t)           2       2       3          4
    H(t) - H(0)         -       -       1          2            (frozen at order 0, whatever H is)

A cumulant with more d_z than the degree gives nothing. Hence (``CONTRIBUTIONS``)

    observable            contributes                           does not, because
    mean output           Theta1; A B; P Q; R S T U             G1, D, F: two d_z on degree 1. V: four
    covariance            G1, Theta1; A B; D F; P Q; R S T U    V: four d_z on degree 2
    fourth cumulant       A B; D F; V; P Q; R S T U             G1, Theta1: they shift the Gaussian, and connect nothing
    NTK drift             P Q; R S T U                          the others: without dH or ddNTK the NTK is frozen
    hidden kernels        none                                  Xi, Y, C of each layer (``hidden_layers``); Mv for the
                                                                neurons' movement: products of first and second
                                                                derivatives of hidden neurons along the frozen path,
                                                                made of B, F, P and Q of that layer, not the last

dNTK (its correlation with z: P, Q) and ddNTK (R, S, T, U) enter together everywhere: one without the other is not a
consistent order. Every power of them comes with e / lambda, so that the expansion is in |e|^2 / (n lambda_min), not in
1/n alone.

**Laws.** Weights and biases enter K, Theta and the vertices by the law of one neuron that is left at infinite width
(``initialization.neuron``). Read-out weights that are not Gaussian add to the cumulants of one and the same output:
E_zzzz, E_zzH, E_HH, E_dHz, E_ddI, E_ddII beside the pairings of V, D F, A B, P Q, R and S T U, where all outputs are
equal. They contribute where those do, as in a network with this one output and its targets.

For other losses F is not a polynomial in z, the degrees are unbounded, and every vertex contributes to every
observable of the outputs (``training.sampled``); parity of the cumulants stays.

**What none of these determines.** E |H(t) - H(0)| of a network is of order 1/n, as is its mean E[H(t) - H(0)], but
contains cov(dH, dH), which is of order 1/n^2: statistics with six labels beyond those above
(``initialization.recursions.fluctuations``). With them the law of one network's drift is closed: along the frozen path
it is a quadratic form of (z, dH), to leading order one Gaussian field (``hierarchy.drift``).
"""

CONTRIBUTIONS = {
    "mean output": ("Theta1", "A", "B", "P", "Q", "R", "S", "T", "U"),
    "covariance": ("G1", "Theta1", "A", "B", "D", "F", "P", "Q", "R", "S", "T", "U"),
    "fourth cumulant": ("A", "B", "D", "F", "V", "P", "Q", "R", "S", "T", "U"),
    "NTK drift": ("P", "Q", "R", "S", "T", "U"),
    "hidden kernels": (),
}
"""For squared error: ``{observable: its contributions at order 1/n}`` out of the last layer's statistics."""
