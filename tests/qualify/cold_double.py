"""`lcexport.qualify.cold` on the test double, for the process that a cold start runs in."""

import double

from lcexport.qualify.cold import main

double.install(setattr)
main()
