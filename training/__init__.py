"""Labelled folders -> chips -> network -> calibrated TorchScript artifact and its report."""
