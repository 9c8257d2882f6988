"""Distributing a training over several processes."""
