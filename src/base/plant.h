/*
 * plant.h - bugs planted on purpose, to prove that the simulator finds them
 * (tests/sim/BUGS.md). `if (FK_BUG(3)) ...` is compiled away everywhere but in the test
 * executables that are built with -DFK_PLANT_BUG=3.
 */
#ifndef FK_BASE_PLANT_H
#define FK_BASE_PLANT_H

#ifndef FK_PLANT_BUG
#define FK_PLANT_BUG 0
#endif
#define FK_BUG(n) (FK_PLANT_BUG == (n))

#endif
