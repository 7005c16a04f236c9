"""Pure array functions: a reference, a form that runs anywhere at speed, and `implementation=` to name one."""
