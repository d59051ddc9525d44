"""Results that both wings share, and the names under which they are logged: imported by all, imports no other room."""
