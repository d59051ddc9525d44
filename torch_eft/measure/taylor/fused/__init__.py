"""Operations on jets about constant parameters, each as one node of autograd's graph."""
