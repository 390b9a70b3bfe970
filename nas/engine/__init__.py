"""What runs a search: proposals scored and booked, in this process or on workers, resumed after any stop."""
