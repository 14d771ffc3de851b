/* The driver of a GPU that is not there, as libcuda.so.1: what PyTorch and Triton ask of it. Launches are counted by runtime.cpp. */

#define SUCCEEDS(name) \
    int name() { return 0; }

/* Contexts, errors, limits. */
SUCCEEDS(cuInit)
SUCCEEDS(cuDeviceGet)
SUCCEEDS(cuDriverGetVersion)
SUCCEEDS(cuDevicePrimaryCtxRetain)
SUCCEEDS(cuCtxGetCurrent)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuGetErrorString)
SUCCEEDS(cuPointerGetAttribute)

/* Code: it is loaded, linked and found, and never looked at. */
SUCCEEDS(cuModuleLoad)
SUCCEEDS(cuModuleLoadData)
SUCCEEDS(cuModuleLoadDataEx)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuModuleGetFunction)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuOccupancyMaxActiveBlocksPerMultiprocessor)
SUCCEEDS(cuOccupancyMaxActiveClusters)

extern void pretend_launched(void) __attribute__((weak));

#define LAUNCHES(name)                            \
    int name() {                                  \
        if (pretend_launched) pretend_launched(); \
        return 0;                                 \
    }
LAUNCHES(cuLaunchKernel)
LAUNCHES(cuLaunchKernelEx)
LAUNCHES(cuLaunchCooperativeKernel)

int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* is_active) {
    *flags = 0;
    *is_active = 1;
    return 0;
}

/* The figures of an H200 that runtime.cpp has too, and its clocks, by the numbers of CUdevice_attribute. */
static const int FACTS[][2] = {
    {1, 1024},     /* threads of a block */
    {8, 49152},    /* shared memory of a block */
    {10, 32},      /* threads of a warp */
    {16, 132},     /* multiprocessors */
    {36, 2619000}, /* kHz of the memory */
    {37, 3201},    /* bits of its bus */
    {39, 2048},    /* threads of a multiprocessor */
    {75, 9},       /* compute capability */
    {76, 0},
    {81, 233472},  /* shared memory of a multiprocessor */
    {97, 232448},  /* shared memory that a block may ask for */
};

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    unsigned number;
    *value = 65536;
    for (number = 0; number < sizeof FACTS / sizeof *FACTS; number++)
        if (FACTS[number][0] == attribute) *value = FACTS[number][1];
    return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads of a block, registers */
    return 0;
}
