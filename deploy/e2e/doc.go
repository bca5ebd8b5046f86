// Package e2e proves ztun on a real cluster: two nodes with kubelet, containerd
// and kube-proxy, an unmodified istiod, the chart of deploy/chart with its
// default values and the image of deploy/image, all in namespaces of this
// machine that vanish with the run, also when it is killed.
//
//	sudo make e2e RUN='PlainPods|Kubectl' MODE=iptables
//
// The cases are ordinary Go tests, so RUN, a regexp, selects them; TestMain
// brings the cluster up before them and prints a table of case, result and time
// after them. A case that did not run fails the run, and so does a skipped one
// where CI=true. Logs of every component are in bin/e2e.
//
// Pods, services and nodes have addresses of both families, IPv4 first.
// kube-proxy runs as nftables on node1 and as iptables on node2, unless MODE
// names one for both. Each node has a network, mounts and processes of its own.
//
// The first run builds etcd, Kubernetes and istiod from the modules that tools
// requires, and unpacks Debian's packages of containerd, runc and the CNI
// plugins, into $ZTUN_E2E_CACHE or ztun/e2e in the user's cache directory: 20
// minutes of CPU, ten of two. Killed meanwhile, the next one goes on from there.
//
// Nothing of this module is in the product's go.mod.
package e2e
