// Stands for TVM's object: two kernels, and the weak cells that the runtime must fill.
typedef int (*task)(int, void *, void *);
__attribute__((weak)) int (*__TVMBackendParallelLaunch)(task, void *, int);
__attribute__((weak)) void *(*__TVMBackendAllocWorkspace)(int, int, unsigned long, int, int);
__attribute__((weak)) int (*__TVMBackendFreeWorkspace)(int, int, void *);

static int nothing(int number, void *environment, void *data) { return 0; }
int first(void *a) { return __TVMBackendParallelLaunch(nothing, a, 0); }
int second(void *a) {
    void *workspace = __TVMBackendAllocWorkspace(1, 0, 64, 2, 32);
    return workspace ? __TVMBackendFreeWorkspace(1, 0, workspace) : -1;
}
