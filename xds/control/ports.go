package control

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/ztun/ztun/xds/workloadapi"
)

// checkContainerPorts finds container ports that Kubernetes would not take.
func checkContainerPorts(p *pod) {
	check := func(field string, cs []corev1.Container) {
		for i, c := range cs {
			at := path{"spec", field, i, "ports"}
			names := make(map[string]bool)
			for j, port := range c.Ports {
				checkNumber(&p.object, at.of(j, "containerPort"), port.ContainerPort)
				if port.Name != "" {
					checkPortName(&p.object, at.of(j, "name"), port.Name)
					if names[port.Name] {
						p.errorf(at.of(j, "name"), "%q is the name of another port of this container", port.Name)
					}
					names[port.Name] = true
				}
				checkProtocol(&p.object, at.of(j, "protocol"), port.Protocol)
			}
		}
	}
	check("containers", p.Spec.Containers)
	check("initContainers", p.Spec.InitContainers)
}

// checkServicePorts finds Service ports that Kubernetes would not take.
func checkServicePorts(s *service) {
	type slot struct {
		port  int32
		proto corev1.Protocol
	}
	at := path{"spec", "ports"}
	names, slots := make(map[string]bool), make(map[slot]bool)
	if len(s.Spec.Ports) == 0 && s.Spec.ClusterIP != corev1.ClusterIPNone && s.Spec.Type != corev1.ServiceTypeExternalName {
		s.errorf(at, "at least one port is needed")
	}
	for i, port := range s.Spec.Ports {
		checkNumber(&s.object, at.of(i, "port"), port.Port)
		checkProtocol(&s.object, at.of(i, "protocol"), port.Protocol)
		switch {
		case port.Name == "" && len(s.Spec.Ports) > 1:
			s.errorf(at.of(i, "name"), "a name is needed when there are several ports")
		case port.Name != "" && names[port.Name]:
			s.errorf(at.of(i, "name"), "%q is the name of another port", port.Name)
		case port.Name != "":
			for _, msg := range validation.IsDNS1123Label(port.Name) {
				s.errorf(at.of(i, "name"), "%q is no port name: %s", port.Name, msg)
			}
		}
		names[port.Name] = true
		where := slot{port.Port, protocolOf(port.Protocol)}
		if slots[where] {
			s.errorf(at.of(i, "port"), "%d/%s is there twice", port.Port, where.proto)
		}
		slots[where] = true
		switch t := port.TargetPort; {
		case t.Type == intstr.String:
			checkPortName(&s.object, at.of(i, "targetPort"), t.StrVal)
		case t.IntVal != 0:
			checkNumber(&s.object, at.of(i, "targetPort"), t.IntVal)
		}
	}
}

func checkNumber(o *object, p path, n int32) {
	if n < 1 || n > 65535 {
		o.errorf(p, "%d is no port: 1 to 65535", n)
	}
}

func checkPortName(o *object, p path, name string) {
	for _, msg := range validation.IsValidPortName(name) {
		o.errorf(p, "%q is no port name: %s", name, msg)
	}
}

func checkProtocol(o *object, p path, proto corev1.Protocol) {
	switch proto {
	case "", corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP:
	default:
		o.errorf(p, "%q is none of TCP, UDP, SCTP", proto)
	}
}

func protocolOf(p corev1.Protocol) corev1.Protocol {
	if p == "" {
		return corev1.ProtocolTCP
	}
	return p
}

// namedPort finds a TCP container port by name, in the containers and in the
// init containers that run beside them.
func namedPort(p *corev1.Pod, name string) (uint32, bool) {
	find := func(c corev1.Container) (uint32, bool) {
		for _, port := range c.Ports {
			if port.Name == name && protocolOf(port.Protocol) == corev1.ProtocolTCP {
				return uint32(port.ContainerPort), true
			}
		}
		return 0, false
	}
	for _, c := range p.Spec.Containers {
		if port, ok := find(c); ok {
			return port, true
		}
	}
	for _, c := range p.Spec.InitContainers {
		if c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways {
			continue
		}
		if port, ok := find(c); ok {
			return port, true
		}
	}
	return 0, false
}

// appProtocol reads the protocol from appProtocol or else from the port name's
// first part, as Istio does.
func appProtocol(p corev1.ServicePort) workloadapi.AppProtocol {
	name := p.Name
	if p.AppProtocol != nil {
		switch name = *p.AppProtocol; name {
		case "kubernetes.io/h2c":
			return workloadapi.AppProtocol_HTTP2
		case "kubernetes.io/ws":
			return workloadapi.AppProtocol_HTTP11
		case "kubernetes.io/wss":
			return workloadapi.AppProtocol_TLS
		}
	}
	name = strings.ToLower(name)
	if strings.HasPrefix(name, "grpc-web") {
		return workloadapi.AppProtocol_UNKNOWN
	}
	name, _, _ = strings.Cut(name, "-")
	switch name {
	case "http":
		return workloadapi.AppProtocol_HTTP11
	case "http2":
		return workloadapi.AppProtocol_HTTP2
	case "grpc":
		return workloadapi.AppProtocol_GRPC
	case "tls", "https":
		return workloadapi.AppProtocol_TLS
	case "tcp":
		return workloadapi.AppProtocol_TCP
	}
	switch p.Port {
	case 25, 53, 3306, 27017: // the server speaks first
		return workloadapi.AppProtocol_TCP
	}
	return workloadapi.AppProtocol_UNKNOWN
}
