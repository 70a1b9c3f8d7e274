"""Many machines: the server as a Ray Serve application. Only what runs there imports Ray."""
