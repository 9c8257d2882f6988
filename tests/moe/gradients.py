"""Outputs and gradients of experts, for tests in the interpreter and on a card. Imports nothing of LitGPT."""


def run(experts, backend, x, routing, upstream):
    """Return the output and all gradients by a backend."""
    experts.forced_backend = backend
    experts.zero_grad()
    x = x.detach().requires_grad_()
    routing = routing._replace(weights_TK=routing.weights_TK.detach().requires_grad_())
    y = experts(x, routing)
    y.backward(upstream)
    gradients = {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "gates": routing.weights_TK.grad, **gradients}


def exact(experts, x, routing, upstream):
    """Return what float64 gives for the same numbers."""
    kept = {name: parameter.detach().clone() for name, parameter in experts.named_parameters()}
    doubled = routing._replace(weights_TK=routing.weights_TK.double())
    truth = run(experts.double(), "loop", x.double(), doubled, upstream.double())
    experts.to(x.dtype).load_state_dict(kept)
    return truth
