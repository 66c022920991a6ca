"""One linear layer, fitted in the metric of its inputs."""
