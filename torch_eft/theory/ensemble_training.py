"""Training of an ensemble at order 1/n: mean output and its covariance, and the drift of the NTK.

Which vertex contributes to which observable follows from one symmetry: changing the sign of the last layer changes
that of z and dH and leaves H, ddI and ddII alone. For squared error, where an output depends on z(0) linearly at order
0:

    E z(t)            Theta1; A, B; P, Q; R, S, T, U           [not G1, V, D, F]
    Cov z(t)          all of them but V
    E H(t) - E H(0)   P, Q; R, S, T, U

The average over z(0) is then exact by Wick contraction, outputs reduce to n_L as a number and to the Gram matrix of
the targets, and nothing grows with n_L. Full-batch gradient descent and gradient flow; momentum, minibatches and
cross-entropy are outside this derivation.
"""

