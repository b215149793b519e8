"""Where runs live: here, in a container, on a host; one factory makes them."""
