"""The container image: build, measure, ship and push it; and the Docker engine."""
