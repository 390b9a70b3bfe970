"""What every room stands on: files read with distrust, pictures, exported folders, failures and interrupts in words."""
