/* Soft-RoCE takes the 7 retries that Mooncake asks a queue pair for as "for ever"; hardware gives up. Ask for 6. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <infiniband/verbs.h>

typedef int modify_qp(struct ibv_qp *pair, struct ibv_qp_attr *wanted, int which);

int ibv_modify_qp(struct ibv_qp *pair, struct ibv_qp_attr *wanted, int which)
{
	modify_qp *next = (modify_qp *)dlsym(RTLD_NEXT, "ibv_modify_qp");

	if (which & IBV_QP_RETRY_CNT && wanted->retry_cnt > 6) {
		struct ibv_qp_attr fewer = *wanted;
		fewer.retry_cnt = 6;
		return next(pair, &fewer, which);
	}
	return next(pair, wanted, which);
}
